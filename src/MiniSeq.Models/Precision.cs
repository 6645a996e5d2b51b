using System.Diagnostics;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>The type in which a model computes. Loss, softmax, norms' statistics, gradients and optimizer state are float32 in each.</summary>
public enum Precision
{
    /// <summary>bfloat16 for a checkpoint stored in 16 bits, where this machine multiplies it clearly faster than float32; else float32.</summary>
    Auto,

    /// <summary>float32.</summary>
    Float32,

    /// <summary>bfloat16 weights and products; in training each weight has a float32 master copy, from which it is rounded.</summary>
    BFloat16,
}

/// <summary>What <see cref="Precision"/> comes to on this machine.</summary>
public static class Precisions
{
    private const double ClearlyFaster = 0.7; // far from both what a machine with bfloat16 units does (0.2 to 0.3) and one without (above 1): a busy moment does not decide

    private static readonly Lazy<bool> s_fastOnCpu = new(() => Seconds(ScalarType.BFloat16) < ClearlyFaster * Seconds(ScalarType.Float32));

    /// <summary>The element type of a model.</summary>
    /// <param name="precision">What is asked for.</param>
    /// <param name="stored">Type of the checkpoint; null for a new model.</param>
    /// <param name="device">Where it will run; on the CPU, <see cref="Precision.Auto"/> times a product of each type, once a process.</param>
    public static ScalarType Resolve(this Precision precision, ScalarType? stored, Device device) => precision switch
    {
        Precision.Float32 => ScalarType.Float32,
        Precision.BFloat16 => ScalarType.BFloat16,
        Precision.Auto when stored is ScalarType.BFloat16 or ScalarType.Float16 && (device.type != TorchSharp.DeviceType.CPU || s_fastOnCpu.Value) => ScalarType.BFloat16,
        Precision.Auto => ScalarType.Float32,
        _ => throw new ArgumentOutOfRangeException(nameof(precision), precision, "There is no such precision."),
    };

    private static double Seconds(ScalarType dtype)
    {
        const int Size = 1024, Runs = 3;
        TensorMemory.KeepFreedMemory();
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var (a, b) = (ones([Size / 4, Size], dtype), ones([Size, Size], dtype));
        double best = double.MaxValue;
        for (int i = 0; i <= Runs; i++)
        {
            var clock = Stopwatch.StartNew();
            a.mm(b).Dispose();
            if (i > 0) best = Math.Min(best, clock.Elapsed.TotalSeconds); // the first makes code and threads
        }
        return best;
    }
}
