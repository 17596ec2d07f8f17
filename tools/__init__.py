"""The command lines. An installation has them as `resnet_backbone.tools`, each with a console command of its own."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports of a tool without a stack trace
