"""What a trim cost and bought: quality, bytes, speed."""
from trimtab.face import make_callable

make_callable(__name__)
