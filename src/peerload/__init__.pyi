from .config import Config as Config
from .engines.api import ModelSeed as ModelSeed
from .engines.api import load as load
from .engines.api import seed as seed
from .errors import PeerloadError as PeerloadError
from .receipt import Receipt as Receipt
