using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>The state of a device's random generator at one moment, to be put in force again: dropout then draws the same mask.</summary>
internal sealed class RandomState : IDisposable
{
    private readonly Tensor? _state; // CPU: the generator's state
    private readonly long _seed;     // CUDA: TorchSharp binds no state there, so a drawn seed stands for it

    private RandomState(Tensor? state, long seed) => (_state, _seed) = (state, seed);

    /// <summary>The state from here on.</summary>
    public static RandomState Capture(Device device)
    {
        if (device.type != DeviceType.CUDA) return new RandomState(get_rng_state().DetachFromDisposeScope(), 0);
        using var drawn = randint(int.MaxValue, 1L, ScalarType.Int64);
        long seed = drawn.item<long>();
        cuda.manual_seed(seed);
        return new RandomState(null, seed);
    }

    /// <summary>Puts this state in force until the result is disposed, then the one before it.</summary>
    public IDisposable Restore()
    {
        var previous = new Previous(get_rng_state().DetachFromDisposeScope());
        if (_state is null) cuda.manual_seed(_seed);
        else set_rng_state(_state);
        return previous;
    }

    /// <inheritdoc/>
    public void Dispose() => _state?.Dispose();

    private sealed class Previous(Tensor state) : IDisposable
    {
        public void Dispose()
        {
            set_rng_state(state);
            state.Dispose();
        }
    }
}
