from rlora.cli import main

main()
