"""Print the folder of the torch package that squeezellm_hf will run with; nothing if there is none.

Run by CMake. In pip's isolated build torch cannot be imported, but the site-packages of the
environment that is being installed into are still known to sysconfig.
"""

import importlib.util
import site
import sysconfig
from pathlib import Path


def main() -> None:
    spec = importlib.util.find_spec("torch")
    candidates = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    places = [
        sysconfig.get_path("platlib"),
        sysconfig.get_path("purelib"),
        site.getusersitepackages(),
    ]
    candidates += [Path(place) / "torch" for place in places]
    for candidate in candidates:
        if (candidate / "include" / "torch").is_dir():
            print(candidate)
            return


if __name__ == "__main__":
    main()
