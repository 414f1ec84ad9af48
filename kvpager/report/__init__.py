"""`kvpager report`: turns a recording into one HTML file that compares reserved and paged memory.

writer     the page around the data
data       the data of a page: what the shown steps need, packed
model      a recording, replayed once
moments    the state at the shown steps, at most 300 of a run
cells      blocks as cells of a map, several blocks per cell if there are many
reserved   the simulated reserved side: one region of the maximum length for each sequence
prefixes   the prefix tree at a step
lives      the lives of requests: queued, prefill, decode, swapped
numbers    the table of numbers
page/      the page: HTML, CSS and JavaScript, which Python joins into one file
"""
