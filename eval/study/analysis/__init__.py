"""The parts of `llava-skip analyze`: each is a module with `measure(model, batches)` and `draw(result, folder)`."""
