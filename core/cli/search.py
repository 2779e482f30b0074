"""`svb search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svb.cli.output import print_json, print_table, say
from svb.config import default_path
from svb.errors import UsageError

if TYPE_CHECKING:
    from svb.retrieve.search import VideoResult


@click.command()
@click.argument("query", required=False)
@click.option("--video", type=click.Path(path_type=Path), help="Search with a video file instead of a text.")
@click.option("--index", "index_path", type=click.Path(path_type=Path), help="The index. [default: ./index]")
@click.option("-k", default=10, show_default=True, help="How many results.")
@click.option(
    "--by",
    default="video",
    type=click.Choice(["video", "moment"]),
    show_default=True,
    help="Rank whole videos, or single moments: a video may then come several times.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def search(
    query: str | None, video: Path | None, index_path: Path | None, k: int, by: str, device: str, as_json: bool
) -> None:
    """Find the videos nearest to a text, or the captions and videos nearest to a video.

    \b
    svb search "a dog catches a frisbee" -k 5
    svb search --video clip.mp4
    """
    if (query is None) == (video is None):
        raise UsageError("give either a text to look for or --video FILE, and not both")
    if video is not None and by != "video":
        raise UsageError("--by moment goes with a text - leave it out with --video")
    from svb.retrieve.search import Searcher

    if index_path is None:
        index_path = default_path("SVB_INDEX", "index")
        say(f"searching {index_path}")
    searcher = Searcher(index_path, device)
    if video is not None:
        captions, videos = searcher.search_video(video, k)
        if as_json:
            print_json(
                {
                    "video": str(video),
                    "captions": [caption.as_json() for caption in captions],
                    "results": [result.as_json() for result in videos],
                }
            )
            return
        if captions:
            rows = [[str(c.rank), f"{c.score:.3f}", c.caption, c.video_id] for c in captions]
            print_table(["rank", "score", "caption", "of video"], rows)
            click.echo()
        _print_videos(videos)
        return
    assert query is not None
    results = searcher.search_text(query, k, by=by)
    if as_json:
        print_json({"query": query, "by": by, "results": [result.as_json() for result in results]})
    else:
        _print_videos(results)


def _print_videos(results: Sequence[VideoResult]) -> None:
    rows = [
        [
            str(result.rank),
            f"{result.score:.3f}",
            f"{_clock(result.moment.begin_seconds)}-{_clock(result.moment.end_seconds)}",
            result.video_id,
        ]
        for result in results
    ]
    print_table(["rank", "score", "moment", "video"], rows)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"
