"""One file a kind of stage: read any of them top to bottom. They meet in the run folder and nowhere else."""

from temper.stages.classifier import TrainClassifier
from temper.stages.data import Data
from temper.stages.evaluate import Evaluate
from temper.stages.generate import Generate
from temper.stages.merge import Merge
from temper.stages.preference import Preference
from temper.stages.pretrain import Pretrain
from temper.stages.reward import TrainReward
from temper.stages.rl import Rl
from temper.stages.sft import Sft
from temper.stages.sweep import Sweep
from temper.stages.warp import Warp

__all__ = [
    "Data",
    "Evaluate",
    "Generate",
    "Merge",
    "Preference",
    "Pretrain",
    "Rl",
    "Sft",
    "Sweep",
    "TrainClassifier",
    "TrainReward",
    "Warp",
]
