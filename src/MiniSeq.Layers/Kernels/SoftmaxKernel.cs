using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>Cross entropy of bfloat16 logits and its gradient in their place, a row at a time while it is in the core's cache; sums are float32, and float64 over rows.</summary>
internal static unsafe class SoftmaxKernel
{
    /// <summary>−log softmax(z)[label] summed over the rows. With a scale, z becomes scale · (softmax(z) − onehot(label)).</summary>
    /// <param name="logits">[rows, V] bfloat16, contiguous.</param>
    /// <param name="labels">[rows] int64, contiguous.</param>
    /// <param name="scale">Null leaves the logits.</param>
    public static double CrossEntropy_(Tensor logits, Tensor labels, double? scale)
    {
        int rows = (int)logits.size(0), width = (int)logits.size(1);
        var losses = new double[rows];
        var z = (ushort*)MatrixKernel.Pointer(logits);
        long* wanted = (long*)MatrixKernel.Pointer(labels);
        Workers.Run(Workers.Count, rows, (_, r) => losses[r] = Row(z + ((long)r * width), width, (int)wanted[r], (float?)scale));
        return losses.Sum(); // in one order, whoever computed them
    }

    private static double Row(ushort* z, int width, int label, float? scale)
    {
        float highest = Highest(z, width), wanted = Number(z[label]);
        var (unit, shift) = (Vector512.Create(VectorMath.Log2E), Vector512.Create(-highest * VectorMath.Log2E));
        Vector512<float> total = default;
        int c = 0;
        for (; c + 16 <= width; c += 16) total += VectorMath.Exp2(Avx512F.FusedMultiplyAdd(VectorMath.Load(z + c), unit, shift));
        float sum = Vector512.Sum(total);
        for (; c < width; c++) sum += VectorMath.Exp2((Number(z[c]) - highest) * VectorMath.Log2E);
        if (scale is { } s) Gradient(z, width, label, s, unit, shift, sum);
        return Math.Log(sum) + highest - wanted;
    }

    private static void Gradient(ushort* z, int width, int label, float scale, Vector512<float> unit, Vector512<float> shift, float sum)
    {
        var factor = Vector512.Create(scale / sum);
        float ofLabel = (VectorMath.Exp2(Avx512F.FusedMultiplyAdd(Vector512.Create(Number(z[label])), unit, shift)) * factor).ToScalar() - scale;
        int c = 0;
        for (; c + 16 <= width; c += 16) VectorMath.Store(VectorMath.Exp2(Avx512F.FusedMultiplyAdd(VectorMath.Load(z + c), unit, shift)) * factor, z + c);
        for (; c < width; c++) z[c] = Bits((VectorMath.Exp2(Avx512F.FusedMultiplyAdd(Vector512.Create(Number(z[c])), unit, shift)) * factor).ToScalar());
        z[label] = Bits(ofLabel);
    }

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
