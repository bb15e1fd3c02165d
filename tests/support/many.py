"""Several training runs in one set of processes: `torchrun -m tests.support.many '[["--data", ...], ...]'`."""

import json
import sys

from train.run import check, parse
from train.train import train

for command in json.loads(sys.argv[1]):
    train(check(*parse(command)))
