"""Which library the kernel tests load: the installed one, or the one that MODES_TEST_LIBRARY names (`make sanitize`)."""

from tests.kernels import calling


def pytest_report_header() -> str:
    return f"kernels: {calling.kernels.isa()}, {calling.kernels.library_path()}"
