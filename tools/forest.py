"""A forest plot: by how much each method differs from the first one, with the 95 % interval of the mean."""

from typing import Dict, List

from selfkd.comparison import Column, Run, differences, verdict

COLOURS = {
    'better': '#1b7f4b',
    'worse': '#c0392b',
    'no clear difference': '#7f8c8d',
    'one pair, no interval': '#bdc3c7',
}


def draw(path: str, panels: Dict[str, Dict[str, List[Run]]], columns: Dict[str, tuple]) -> None:
    """Writes the plot as SVG: a row of axes for each panel, one for each measure, better to the left.

    Args:
        path: of the picture.
        panels: title -> group -> runs. The first group is what the others are compared with.
        columns: as those of :func:`selfkd.comparison.comparison_table`; those that are neither good nor bad are left
            out.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = {title: Column(*column) for title, column in columns.items() if Column(*column).better}
    heights = [0.28 * len(groups) + 0.7 for groups in panels.values()]
    figure = Figure(figsize=(2.6 + 1.9 * len(shown), sum(heights) + 0.6), layout='constrained')
    grid = dict(height_ratios=heights)
    axes = figure.subplots(len(panels), len(shown), squeeze=False, sharey='row', sharex='col', gridspec_kw=grid)
    for row, (panel, groups) in zip(axes, panels.items()):
        plain, *methods = groups
        found = differences(groups, columns)
        for axis, (title, column) in zip(row, shown.items()):
            axis.axvline(0, color='black', linewidth=0.8)
            for height, method in enumerate(methods):
                if found[method]:
                    one = found[method][title]
                    style = dict(color=COLOURS[verdict(one, str(column.better))])
                    axis.plot(one.mean, height, 'o', markersize=5, **style)
                    if one.low is not None:
                        axis.plot([one.low, one.high], [height, height], linewidth=2, **style)
            axis.set_yticks(range(len(methods)), methods)
            axis.set_xlabel(title, fontsize=9)
            axis.tick_params(axis='x', labelsize=8, labelbottom=True)
            axis.tick_params(axis='y', length=0)
            axis.spines[['top', 'right', 'left']].set_visible(False)
            axis.grid(axis='x', color='#eeeeee')
            axis.set_axisbelow(True)
        row[0].set_ylim(len(methods) - 0.5, -0.5)
        row[0].set_title(panel, loc='left', fontsize=10, fontweight='bold')
    for axis, column in zip(axes[0], shown.values()):
        if column.better == 'higher':
            axis.invert_xaxis()
    handles = [figure.axes[0].plot([], [], 'o-', color=colour, label=word)[0] for word, colour in COLOURS.items()]
    figure.legend(handles=handles[:3], loc='outside lower center', ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f'difference to {plain}, 95 % interval; better to the left', fontsize=10)
    with rc_context({'svg.hashsalt': 'selfkd', 'svg.fonttype': 'none'}):
        FigureCanvasSVG(figure).print_svg(path, metadata={'Date': None})
