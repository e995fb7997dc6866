"""README and docs: every command, config, file and link in them is tried. The README's are run for real."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro
from conftest import ROOT, case
from upath import UPath

import rlora
from rlora.cli.arguments import Export, Grade, Jobs, Runs, Scale, Submit
from rlora.cli.overrides import parse_check, parse_eval, parse_replay, parse_show, parse_train
from rlora.config import changed, flattened, read, validate
from rlora.core.objectives.objective import Objective
from rlora.plugin import load
from rlora.rollout.task import load_task
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.run.source import given
from rlora.scoring.signatures import plug
from rlora.store import write_directory
from rlora.telemetry.metrics import figures_of
from rlora.train import drive
