"""vLLM, and the checks that it serves exactly the adapter versions that the learner made.

The life of a version in an engine. Loading, verifying and unloading happen between two steps of vLLM; requests in
flight continue under their own versions.

    Engine.load(adapter)      Abort the policy's requests for versions below `oldest`. If all slots are
       |                      in use: unload an idle version, or step until one is idle.               loaded.py
       v
    written to RAM            The two PEFT files, in /dev/shm or, if that is full, in TMPDIR.          scratch.py
       |
       v
    loaded into a slot        Under a new LoRA name and id, so that no cache of vLLM can be stale.     building.py
       |
       v
    verified                  1. The digest of the files that vLLM read.                               vllm_engine.py
       |                      2. The tensors in the slot, number by number.                            slots.py
       |                      If a check fails: unload, and raise DeliveryError.
       v
    Receipt to the caller     `generate` accepts the version from now on.
       |
       v
    leased by requests        One lease per request, until its last token.                             loaded.py
       |                      3. The canary's logprobs against the learner's. The canary runs with     canary.py
       |                      the first request (for an engine's first version, in `load`). No
       |                      episode is returned before the canary has passed. If the canary fails,
       |                      requests raise DeliveryError.
       v
    retired                   No lease, and neither the policy's newest version nor the version that   loaded.py
       |                      was requested last.
       v
    unloaded                  Removed from its slot, then its files are deleted.                       vllm_engine.py

With `learner.adapter = "none"` there is one version at a time: vLLM reloads all weights in place, without check 2.

A lease is a request's claim on the version that samples it: an engine does not unload a version that has leases. The
canary is a short token sequence. The learner computes the canary's logprobs under each version and under the base, and
sends them with the version (`records.Canary`).
"""
