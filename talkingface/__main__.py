"`python -m talkingface`: the command line of talkingface.cli."
import sys

from .cli import main

sys.exit(main())
