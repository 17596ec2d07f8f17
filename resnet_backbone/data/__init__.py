"""Classification data: sources, decoding, transforms, samplers and loaders, and the generated sets.

Everything here takes plain values and knows neither configs nor Detectron2. The way of one image:
`sampler.BatchSampler` (which index at which position) -> `sources` (its bytes) -> `decode` (pixels) -> `transforms`
(augmentation, drawn from the seed and the position; `functional` holds what is done to pixels) -> `classification`
(batches).
"""
