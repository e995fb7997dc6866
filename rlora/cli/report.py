"""`rlora report`: one HTML page about runs or a sweep."""

import tyro

from rlora.cli.arguments import Report
from rlora.records import RloraError


def report_command(arguments: list[str]) -> None:
    """Write the page, and with --watch write it again after each step."""
    options = tyro.cli(Report, args=arguments, prog="rlora report")
    for field, value in (("episodes-mib", options.episodes_mib), ("watch", options.watch or 0.0)):
        if value < 0:
            raise RloraError(f"--{field} {value:g}: a negative number; use 0 or more")
    if options.out.is_dir():
        raise RloraError(f"--out {options.out}: it is a directory; name a file, such as {options.out / 'report.html'}")
    from rlora.report.report import watch, write_report

    limit = int(options.episodes_mib * 2**20)
    if options.watch:
        watch(options.runs, options.out, limit, options.watch)
    else:
        write_report(options.runs, options.out, limit)
    print(f"report: {options.out} ({options.out.stat().st_size / 2**20:.1f} MiB)")
