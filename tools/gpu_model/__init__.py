"""A model of what the kernels cost on a GPU, from what the compiler makes of them.

    launches     what a call launches: runs the launchers on tensors without storage
    compiling    compiles a launch ahead of time, reads registers and shared memory
    sass         reads the machine code
    walk         follows one program through it: which instructions, at which addresses
    registers    what the program's threads know while it is followed
    integers     what instructions do with integers and predicates
    traffic      bytes from the second-level cache
    machine      what is assumed about each GPU, with sources
    timing       the model: throughput, latency, waves
    prediction   a whole call
    rival        the least that the compiled einsum form moves
    tables       the tables of docs/gpu-model.md

docs/gpu-model.md says what the figures mean, and what was never calibrated.
"""
