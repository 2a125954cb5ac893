"""What can be known of a name on the Hub before anything is loaded."""

import ssl
import urllib.error
import urllib.request
from http.client import HTTPException

import huggingface_hub.constants


def cached(name: str) -> bool:
    """Whether something of this Hub name was downloaded before; what can be no name is an error at once."""
    found = (huggingface_hub.try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
    return any(isinstance(file, str) for file in found)


def answers() -> bool:
    """Whether asking the Hub is worth it: without it, transformers tries again for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        asked = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(asked, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, HTTPException) as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # other certificates may be trusted there
    return True
