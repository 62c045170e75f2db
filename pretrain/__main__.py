from pretrain.cli import program

program()
