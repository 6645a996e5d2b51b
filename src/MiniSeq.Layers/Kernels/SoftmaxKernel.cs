using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>Cross entropy of bfloat16 logits and its gradient in their place, a row at a time while it is in the core's cache; sums are float32, and float64 over rows.</summary>
internal static unsafe class SoftmaxKernel
{
    /// <summary>−log softmax(z)[label] summed over the rows. With a scale, z becomes scale · (softmax(z) − onehot(label)).</summary>
    /// <param name="logits">[rows, V] bfloat16, contiguous.</param>
    /// <param name="labels">[rows] int64.</param>
    /// <param name="scale">Null leaves the logits.</param>
    /// <exception cref="ArgumentException">Labels of another type or number, or one outside 0..V−1.</exception>
    public static double CrossEntropy_(Tensor logits, Tensor labels, double? scale)
    {
        int rows = (int)logits.size(0), width = (int)logits.size(1);
        if (labels.dtype != ScalarType.Int64 || labels.numel() != rows) throw new ArgumentException($"{rows} rows take as many labels of type Int64, and got {labels.numel()} of {labels.dtype}.", nameof(labels));
        using var together = labels.contiguous();
        var losses = new double[rows];
        var z = (ushort*)MatrixKernel.Pointer(logits);
        long* wanted = (long*)MatrixKernel.Pointer(together);
        for (int r = 0; r < rows; r++)
            if ((ulong)wanted[r] >= (ulong)width) throw new ArgumentException($"Label {wanted[r]} of row {r} is outside the vocabulary 0..{width - 1}.", nameof(labels));
        Workers.Run(Workers.Count, rows, (_, r) => losses[r] = Row(z + ((long)r * width), width, (int)wanted[r], (float?)scale));
        return losses.Sum(); // in one order, whoever computed them
    }

    private static double Row(ushort* z, int width, int label, float? scale)
    {
        float highest = Highest(z, width), wanted = Number(z[label]);
        Vector512<float> total = default;
        int c = 0;
        for (; c + 16 <= width; c += 16) total += Exp(VectorMath.Load(z + c), highest);
        float sum = Vector512.Sum(total);
        for (; c < width; c++) sum += Exp(Number(z[c]), highest);
        if (scale is { } s) Gradient(z, width, label, s, highest, sum);
        return Math.Log(sum) + highest - wanted;
    }

    private static void Gradient(ushort* z, int width, int label, float scale, float highest, float sum)
    {
        float share = scale / sum, ofLabel = (Exp(Number(z[label]), highest) * share) - scale;
        int c = 0;
        for (; c + 16 <= width; c += 16) VectorMath.Store(Exp(VectorMath.Load(z + c), highest) * share, z + c);
        for (; c < width; c++) z[c] = Bits(Exp(Number(z[c]), highest) * share);
        z[label] = Bits(ofLabel);
    }

    // The difference first: it is exact for the highest, whose gradient is then zero where it is alone.
    private static Vector512<float> Exp(Vector512<float> z, float highest) => VectorMath.Exp2((z - Vector512.Create(highest)) * VectorMath.Log2E);

    private static float Exp(float z, float highest) => Exp(Vector512.Create(z), highest).ToScalar();

    private static float Highest(ushort* z, int width)
    {
        var most = Vector512.Create(float.NegativeInfinity);
        int c = 0;
        for (; c + 16 <= width; c += 16) most = Avx512F.Max(most, VectorMath.Load(z + c));
        float highest = float.NegativeInfinity;
        for (int i = 0; i < 16; i++) highest = Math.Max(highest, most[i]);
        for (; c < width; c++) highest = Math.Max(highest, Number(z[c]));
        return highest;
    }

    private static float Number(ushort bits) => BitConverter.UInt32BitsToSingle((uint)bits << 16);

    private static ushort Bits(float x) => (ushort)VectorMath.Rounded(Vector512.Create(x)).ToScalar();
}
