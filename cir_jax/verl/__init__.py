"""The way in from veRL: a launch command becomes a config, with a word on each of its keys.

words.py and shell.py read the script, hydra.py its arguments, keys.py says what each key is here,
translate.py puts that together, command.py is `cir-jax import-verl`.
"""
