"""What a library would tell its maker stays untold, unless the environment says otherwise. Import this before it.

onnxruntime, from 1.29 on, sends Microsoft what it runs, also from Linux, under an id that it leaves in the home
directory. It looks at the environment when it is loaded.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
