"""The run folder, its log and checkpoints, and the processes of a run."""

from pretrain.run.checkpoints import load_checkpoint, save_checkpoint
from pretrain.run.folder import complete, finish, flat, go_on, needs, open_run
from pretrain.run.log import Log
from pretrain.run.processes import accelerator, check_precision, check_world, divide, is_main, on_main, share, stopping
from pretrain.run.tracked import open_log
from pretrain.run.trackers import check_trackers
