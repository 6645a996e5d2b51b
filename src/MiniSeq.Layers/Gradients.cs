using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>Accumulation into <c>.grad</c>, in place and in float32 or better.</summary>
public static class Gradients
{
    /// <summary>
    /// parameter.grad += gradient. The first gradient becomes <c>.grad</c>; a bfloat16 or float16 parameter gets a float32
    /// <c>.grad</c>, because adding many chunks in bfloat16 loses accuracy with their number.
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

    /// <summary>parameter.grad += aᵀ b, without a temporary of the parameter's size where the element types allow.</summary>
    /// <param name="parameter">[m, n].</param>
    /// <param name="a">[rows, m].</param>
    /// <param name="b">[rows, n].</param>
    public static void AccumulateProduct(Tensor parameter, Tensor a, Tensor b)
    {
        if (!parameter.requires_grad) return;
        using var noGrad = no_grad();
        using var existing = parameter.grad;
        using var at = a.t();
        if (existing is not null && existing.dtype == a.dtype)
        {
            existing.addmm_(at, b);
            return;
        }
        using var product = at.mm(b);
        if (existing is not null) existing.add_(product);
        else if (product.dtype == AccumulationType(parameter.dtype)) parameter.grad = product;
        else Accumulate(parameter, product);
    }

    /// <summary>float32 for the 16-bit types, else the type itself.</summary>
    public static ScalarType AccumulationType(ScalarType dtype) =>
        dtype is ScalarType.BFloat16 or ScalarType.Float16 ? ScalarType.Float32 : dtype;
}
