"""What any training program needs and the paper does not speak of. One purpose a file."""
import sys

if sys.version_info < (3, 10):                     # noqa: UP036, which trusts pyproject.toml
    print("error: this needs Python 3.10 or newer, here is "
          "{}.{}".format(*sys.version_info[:2]), file=sys.stderr)
    sys.exit(2)
