"""DyCoke against plain loops."""

from __future__ import annotations

import reference_ops
from method_views import rows_of_selection, video_method, video_view


def test_dycoke_against_loops() -> None:
    reducer = video_method("dycoke", keep=None)
    view = video_view(reducer, [(6, 5)], [18], still=0.6)  # frames 0 and 4 whole; 8 among 1, 2, 3, 5
    assert view.features is not None
    rows = view.features[0].double().tolist()
    kept = [*range(5), *range(20, 25)]
    for frame, other in ((1, 0), (2, 0), (3, 2), (5, 4)):
        places = sorted(range(5), key=lambda p: reference_ops.cosine(rows[frame * 5 + p], rows[other * 5 + p]))[:2]
        kept += [frame * 5 + p for p in places]
    assert [token for token, _ in rows_of_selection(reducer.select_tokens(view), 0)] == sorted(kept)
    few = video_view(reducer, [(6, 5)], [4])
    # spread over the frames that stay whole
    assert [token for token, _ in rows_of_selection(reducer.select_tokens(few), 0)] == [2, 4, 22, 24]
