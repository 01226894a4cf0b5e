"""Run a campaign."""

from chaos.campaign import main

main()
