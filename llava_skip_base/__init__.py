"""What every program needs before anything heavy is loaded: errors, files, paths, exit codes, printing, the command.

It is a package of its own since `import llava_skip` loads torch and transformers; scoring and `--help` need neither.
"""
