from .config import Config as Config
from .engines.transformers.api import ModelSeed as ModelSeed
from .engines.transformers.api import load as load
from .engines.transformers.api import seed as seed
from .errors import PeerloadError as PeerloadError
from .receipt import Receipt as Receipt
