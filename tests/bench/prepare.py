"""How fast prepare.py is and how much memory it takes.

    python tests/bench/prepare.py                               200 MB of Python's reference, three runs each
    python tests/bench/prepare.py --mb=2000 --n=1               the memory that 2 GB take
    python tests/bench/prepare.py --text=input.txt --mb=1 --nanogpt=../nanoGPT

The text is repeated until it has the size. With --nanogpt, its data/shakespeare_char/prepare.py on the same text.
"""
import pydoc_data.topics
import shutil
import tempfile
from pathlib import Path

from common import ROOT, facts, launch, parser, report


def main(argv=None):
    """The command line."""
    options = parser(__doc__, "prepare")
    options.add_argument("--mb", type=float, default=200, help="size of the text in megabytes")
    options.add_argument("--tokenizers", default="char,byte,gpt2", help="separated by commas")
    options.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to time its prepare.py on the same text")
    args = options.parse_args(argv)
    text = (args.text or Path(pydoc_data.topics.__file__)).read_bytes()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "text.txt")
        with open(path, "wb") as file:
            while file.tell() < args.mb * 1e6:
                file.write(text)
        mb = path.stat().st_size / 1e6
        commands = {f"prepare.py {tokenizer}": [ROOT / "prepare.py", "text.txt", f"--tokenizer={tokenizer}"]
                    for tokenizer in args.tokenizers.split(",")}
        if args.nanogpt:
            shutil.copy(args.nanogpt / "data" / "shakespeare_char" / "prepare.py", name)
            path.with_name("input.txt").hardlink_to(path)
            commands["nanoGPT's shakespeare_char"] = ["prepare.py"]
        known, found = facts(n=args.n, mb=round(mb, 1)), {}
        for label, command in commands.items():
            runs = [launch(command, name) for _ in range(args.n)]
            found[label] = [{"MB/s": mb / run.seconds, "peak MB": run.peak} for run in runs]
    report(args.json, known, found)


if __name__ == "__main__":
    main()
