"""Run directories and evaluations as one HTML file that needs nothing else.

Figures are matplotlib's SVG: it is what the analyses are drawn with, a figure has some 20 kB where
plotly's and bokeh's scripts have megabytes, and the page's own style sheet colours it, light or
dark. Trajectories are compressed in the file and unpacked, a few at a time, when they are looked
at. Text that models and programs wrote reaches the page as such compressed JSON and is put into it
as text, never as HTML; besides, the page's policy allows no script but its own, and no request.
"""
