"""One call of a handle, from the outside in.

    handle(x)                          handle/calls.py      chooses the frame and readies the base
      pack(x)                          call_inputs.py       of a packed row: the boundaries of its texts go into the frame
      with entered(frame):             frame.py             the frame is this thread's current one
        prepare(x)                     call_inputs.py       virtual tokens go in front of the input
        base(x)                        the base itself      runs as it always does, down to a targeted module
          module.forward(x)            site.py              a `Site` stands in the module's `__dict__`
            fold(module, adapters)(x)  fold.py              the frame's adapters for this site, the first one innermost
              Lora.forward(x, view)    methods/lora.py      y = W x + b + s B A x; `view` (bases/view.py) is the module

A *frame* says what acts in a call: `{site: adapters}`, virtual tokens, penalties. It is made once for each set of active
adapters (handle/frames.py), never changed, and current for one thread while the call runs. A *site* holds no adapter: it
asks the current frame, and without one it is the module's own forward. So a base runs bare for whoever calls it directly,
any number of handles share it, and switching between adapters copies nothing.

What a call can hold besides:

- `mixed_batch.py`: rows with different adapters. A module runs once for each group of rows that share theirs.
- `virtual_tokens.py`, `rows.py`: embeddings in front of each row, with the masks, positions and labels that go with them.
- `generation.py`: the same in every call that `generate` makes, and the modes in which that is not exact.
- `prefix.py`: keys and values in front of each layer's own. They enter through `cache.py`, which alone knows what
  transformers calls its caches.
- `packed_row.py`, `packed_attention.py`: several texts in one row, none of which attends to another.
- `adapted.py`: a view of a module with an adapter on it, for the second adapter on the same module.
- `reads.py`, `lazy_weight.py`: weights that a model reads instead of calling their modules are what merging would make of them.
- `recompute.py`: layers that gradient checkpointing computes again see the frame of their forward pass.
- `own_state.py`: what the handle sets on modules of the base (its mode, flags, hooks), there while the frame is current.
"""
