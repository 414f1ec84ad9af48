"""`kvpager report`: a recording as one HTML file, which shows what paging makes of the memory.

writer     the page around the data
data       the data of a page: what the shown steps need, packed
model      a recording, replayed once
moments    the state at the shown steps, at most a few hundred of a run
cells      blocks as cells of a map, several blocks per cell if there are many
reserved   the naive allocator on the same sequences: one region of the maximum length for each
prefixes   the prefix tree at a step
lives      the lives of requests: queued, prefill, decode, swapped
numbers    the table of numbers
page/      the page: HTML, CSS and JavaScript, which Python joins into one file
"""
