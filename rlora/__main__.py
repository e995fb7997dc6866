from rlora.cli.main import main

main()
