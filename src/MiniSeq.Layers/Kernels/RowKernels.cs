using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>
/// The row-wise parts of a layer between its products, in bfloat16 on the CPU: each in one visit of its numbers, with float32 in registers, where
/// libtorch's operators take seven (a norm) or three (a gated activation) passes over memory.
/// </summary>
internal static unsafe class RowKernels
{
    private const long TaskNumbers = 1 << 15; // of one task

    /// <summary>Whether <see cref="MatrixKernel"/> takes these, rows are whole vectors, and no graph is to be recorded.</summary>
    public static bool Take(Tensor x) => MatrixKernel.Takes(x) && x.size(-1) % 16 == 0 && !is_grad_enabled();

    /// <summary>Whether a norm of these has a kernel: as <see cref="Take(Tensor)"/>, and the weight is as wide and of the same type.</summary>
    public static bool Take(Tensor x, Tensor weight) => Take(x) && weight.dtype == x.dtype && weight.numel() == x.size(-1);

    /// <summary>RMSNorm, y = x r w, r = (mean(x²) + ε)^−½; x r is rounded before it meets w, as in Hugging Face's code, or not rounded and multiplied by 1 + w (Gemma's).</summary>
    /// <param name="input">[.., d].</param>
    /// <param name="weight">[d].</param>
    /// <param name="eps">ε.</param>
    /// <param name="unitOffset">Gemma's.</param>
    public static Tensor Norm(Tensor input, Tensor weight, double eps, bool unitOffset)
    {
        using var scope = NewDisposeScope();
        var (x, output) = (input.contiguous(), empty(input.shape, input.dtype));
        int d = (int)input.size(-1);
        ushort* from = (ushort*)MatrixKernel.Pointer(x), w = (ushort*)MatrixKernel.Pointer(weight), to = (ushort*)MatrixKernel.Pointer(output);
        ForRows(input.numel() / d, d, (_, row) =>
        {
            ushort* a = from + (row * d), b = to + (row * d);
            var r = Vector512.Create(InverseRms(a, d, eps));
            for (int c = 0; c < d; c += 16)
            {
                var n = VectorMath.Load(a + c) * r;
                var factor = VectorMath.Load(w + c);
                if (unitOffset) factor += Vector512<float>.One;
                else n = (VectorMath.Rounded(n) << 16).AsSingle();
                VectorMath.Store(n * factor, b + c);
            }
        });
        return output.MoveToOuterDisposeScope();
    }

    /// <summary>dx of <see cref="Norm"/> and, where it is asked for, dw [d] float32: n = x r, dw = Σ dy ⊙ n, g = dy ⊙ w, dx = r (g − n mean(g ⊙ n)).</summary>
    public static (Tensor Dx, Tensor? Dw) NormBackward(Tensor input, Tensor gradient, Tensor weight, double eps, bool unitOffset, bool needsWeightGradient)
    {
        using var scope = NewDisposeScope();
        var (x, dy, output) = (input.contiguous(), gradient.contiguous(), empty(input.shape, input.dtype));
        int d = (int)input.size(-1);
        int stripes = Workers.Count; // of rows, each with a sum of its own: the same sums whichever worker takes which
        long rows = input.numel() / d;
        var sums = needsWeightGradient ? zeros([stripes, d], ScalarType.Float32) : null;
        ushort* px = (ushort*)MatrixKernel.Pointer(x), pdy = (ushort*)MatrixKernel.Pointer(dy), w = (ushort*)MatrixKernel.Pointer(weight), pdx = (ushort*)MatrixKernel.Pointer(output);
        float* sum = sums is null ? null : (float*)MatrixKernel.Pointer(sums);
        void Row(int stripe, long row)
        {
            ushort* a = px + (row * d), dya = pdy + (row * d), dxa = pdx + (row * d);
            float* dw = sum + ((long)stripe * d);
            float inverse = InverseRms(a, d, eps);
            var r = Vector512.Create(inverse);
            Vector512<float> along = default;
            for (int c = 0; c < d; c += 16)
            {
                var products = VectorMath.Load(dya + c) * VectorMath.Load(a + c) * r;
                along += products * Factor(w + c, unitOffset);
                if (sum != null) (Vector512.Load(dw + c) + products).Store(dw + c);
            }
            var mean = Vector512.Create(Vector512.Sum(along) / d);
            for (int c = 0; c < d; c += 16)
                VectorMath.Store(r * ((VectorMath.Load(dya + c) * Factor(w + c, unitOffset)) - (VectorMath.Load(a + c) * r * mean)), dxa + c);
        }
        Workers.Run(stripes, stripes, (_, stripe) =>
        {
            for (long row = stripe * rows / stripes, end = (stripe + 1) * rows / stripes; row < end; row++) Row(stripe, row);
        });
        return (output.MoveToOuterDisposeScope(), sums?.sum(dim: 0).MoveToOuterDisposeScope());
    }

    /// <summary>silu(gate) ⊙ up, [rows, I].</summary>
    public static Tensor Swiglu(Tensor gate, Tensor up)
    {
        using var scope = NewDisposeScope();
        var (g, u, output) = (gate.contiguous(), up.contiguous(), empty(gate.shape, gate.dtype));
        int width = (int)gate.size(-1);
        ushort* pg = (ushort*)MatrixKernel.Pointer(g), pu = (ushort*)MatrixKernel.Pointer(u), to = (ushort*)MatrixKernel.Pointer(output);
        ForRows(gate.numel() / width, width, (_, row) =>
        {
            for (long c = row * width; c < (row + 1) * width; c += 16)
            {
                var x = VectorMath.Load(pg + c);
                VectorMath.Store(x * Sigmoid(x) * VectorMath.Load(pu + c), to + c);
            }
        });
        return output.MoveToOuterDisposeScope();
    }

    /// <summary>The gradients of gate and up in their place, from that of <see cref="Swiglu"/>; all contiguous.</summary>
    /// <remarks>s = σ(g); dg = dh ⊙ u ⊙ s (1 + g (1 − s)); du = dh ⊙ g s.</remarks>
    public static void SwigluBackward_(Tensor dHidden, Tensor gate, Tensor up)
    {
        int width = (int)gate.size(-1);
        ushort* pd = (ushort*)MatrixKernel.Pointer(dHidden), pg = (ushort*)MatrixKernel.Pointer(gate), pu = (ushort*)MatrixKernel.Pointer(up);
        ForRows(gate.numel() / width, width, (_, row) =>
        {
            for (long c = row * width; c < (row + 1) * width; c += 16)
            {
                var (x, dh) = (VectorMath.Load(pg + c), VectorMath.Load(pd + c));
                var s = Sigmoid(x);
                VectorMath.Store(dh * VectorMath.Load(pu + c) * s * (Vector512<float>.One + (x * (Vector512<float>.One - s))), pg + c);
                VectorMath.Store(dh * x * s, pu + c);
            }
        });
    }

    private static Vector512<float> Sigmoid(Vector512<float> x) => Vector512<float>.One / (Vector512<float>.One + VectorMath.Exp2(Avx512F.Min(Vector512.Create(126f), x * -VectorMath.Log2E)));

    private static Vector512<float> Factor(ushort* w, bool unitOffset) => unitOffset ? VectorMath.Load(w) + Vector512<float>.One : VectorMath.Load(w);

    private static float InverseRms(ushort* x, int d, double eps)
    {
        Vector512<float> squares = default;
        for (int c = 0; c < d; c += 16)
        {
            var a = VectorMath.Load(x + c);
            squares = Avx512F.FusedMultiplyAdd(a, a, squares);
        }
        return 1 / MathF.Sqrt((Vector512.Sum(squares) / d) + (float)eps);
    }

    private static void ForRows(long rows, int width, Action<int, long> body)
    {
        long block = Math.Max(1, TaskNumbers / width);
        Workers.Run(Workers.Count, checked((int)((rows + block - 1) / block)), (worker, task) =>
        {
            for (long row = task * block, end = Math.Min(rows, row + block); row < end; row++) body(worker, row);
        });
    }
}
