"""The command lines. An installation has them as `resnet_backbone.tools`, each with a console command of its own."""
