using System.Runtime;

namespace MiniSeq.Training;

/// <summary>
/// Keeps the garbage collector out of a step. TorchSharp passes bare handles to native code, and a collection at the wrong moment can
/// finalize a temporary number that an operator is still reading.
/// </summary>
internal sealed class CollectionPause : IDisposable
{
    private const long Budget = 200 << 20; // managed bytes of a step: 72 an operator
    private readonly bool _started;

    public CollectionPause()
    {
        if (GCSettings.LatencyMode == GCLatencyMode.NoGCRegion) return; // an outer one is in force
        try
        {
            _started = GC.TryStartNoGCRegion(Budget);
        }
        catch (Exception e) when (e is ArgumentOutOfRangeException or InvalidOperationException)
        {
            // A heap too small for the budget, or another thread was first: the step runs without the pause.
        }
    }

    public void Dispose()
    {
        // A step that allocated more than the budget has ended the region itself.
        if (_started && GCSettings.LatencyMode == GCLatencyMode.NoGCRegion) GC.EndNoGCRegion();
    }
}
