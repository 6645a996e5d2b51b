using MiniSeq.Layers.Kernels;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>Accumulation into <c>.grad</c>, in place and in float32 or better.</summary>
public static class Gradients
{
    internal const long BlockBytes = 16 << 20;
    internal const long FewestBlockRows = 256;

    /// <summary>
    /// parameter.grad += gradient. A bfloat16 or float16 parameter gets a float32 <c>.grad</c>, because adding many chunks in
    /// bfloat16 loses accuracy with their number.
    /// </summary>
    /// <param name="parameter">Left alone where it does not require a gradient.</param>
    /// <param name="gradient">Same shape; the caller still owns it.</param>
    public static void Accumulate(Tensor parameter, Tensor gradient)
    {
        if (!parameter.requires_grad) return;
        using var noGrad = no_grad();
        using var existing = parameter.grad;
        if (existing is not null)
        {
            existing.add_(gradient);
            return;
        }
        using var first = gradient.to(AccumulationType(parameter.dtype), copy: true);
        parameter.grad = first;
    }

    /// <summary>parameter.grad += aᵀ b, without a temporary of the parameter's size.</summary>
    /// <param name="parameter">[m, n].</param>
    /// <param name="a">[rows, m].</param>
    /// <param name="b">[rows, n].</param>
    public static void AccumulateProduct(Tensor parameter, Tensor a, Tensor b)
    {
        if (!parameter.requires_grad) return;
        using var noGrad = no_grad();
        using var existing = parameter.grad;
        if (existing is not null)
        {
            AddProduct(existing, a, b);
            return;
        }
        using var first = empty(parameter.shape, AccumulationType(parameter.dtype), parameter.device);
        AddProduct(first, a, b, add: false);
        parameter.grad = first;
    }

    /// <summary>accumulator += aᵀ b, or accumulator = aᵀ b. A 16-bit product is rounded before it is added, a block of rows at a time.</summary>
    /// <param name="accumulator">[m, n].</param>
    /// <param name="a">[rows, m].</param>
    /// <param name="b">[rows, n].</param>
    /// <param name="add">Whether the accumulator has a value already; without, what is in its memory does not matter.</param>
    public static void AddProduct(Tensor accumulator, Tensor a, Tensor b, bool add = true)
    {
        if (MatrixKernel.Takes(a) && accumulator.dtype == ScalarType.Float32 && accumulator.is_contiguous())
        {
            WeightGradient.Add(accumulator, a, b, add);
            return;
        }
        using var at = a.t();
        if (accumulator.dtype == a.dtype)
        {
            accumulator.addmm_(at, b, beta: add ? 1 : 0);
            return;
        }
        long block = Math.Max(FewestBlockRows, BlockBytes / Math.Max(1, b.size(1) * b.element_size()));
        Chunking.ForEach(at.size(0), block, (start, count) =>
        {
            var (sum, product) = (accumulator.narrow(0, start, count), at.narrow(0, start, count).mm(b));
            if (add) sum.add_(product);
            else sum.copy_(product);
        });
    }

    /// <summary>float32 for the 16-bit types, else the type itself.</summary>
    public static ScalarType AccumulationType(ScalarType dtype) =>
        dtype is ScalarType.BFloat16 or ScalarType.Float16 ? ScalarType.Float32 : dtype;
}
