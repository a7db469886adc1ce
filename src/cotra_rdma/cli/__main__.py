"""`python -m cotra_rdma.cli`: the `cotra` command."""

from cotra_rdma.cli import main

main()
