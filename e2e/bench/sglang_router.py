#!/usr/bin/env python3
"""SGLang's router alone, from the folder of its package (BENCH_SGLANG_FOLDER) and with its own arguments.

Its command imports web frameworks that only its other modes need; this needs none.
"""

import argparse
import os
import sys

sys.path.insert(0, os.environ["BENCH_SGLANG_FOLDER"])

from sglang_router.router import Router  # noqa: E402
from sglang_router.router_args import RouterArgs  # noqa: E402

parser = argparse.ArgumentParser()
RouterArgs.add_cli_args(parser)
Router.from_args(RouterArgs.from_cli_args(parser.parse_args())).start()
