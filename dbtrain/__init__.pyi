from dbtrain.api import ConfigError as ConfigError
from dbtrain.api import DataError as DataError
from dbtrain.api import DbtrainError as DbtrainError
from dbtrain.api import EngineError as EngineError
from dbtrain.api import Result as Result
from dbtrain.api import Stop as Stop
from dbtrain.api import StopRequested as StopRequested
from dbtrain.api import Trained as Trained
from dbtrain.api import load as load
from dbtrain.api import score as score
from dbtrain.api import train_manifest as train_manifest
from dbtrain.api import train_subject as train_subject

__version__: str
API: tuple[str, ...]
