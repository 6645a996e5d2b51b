using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>A module whose weight may carry an adapter.</summary>
public interface IAdaptable
{
    /// <summary>[rows, columns].</summary>
    Parameter Weight { get; }

    /// <summary>What is added to the weight, or null. Setting it puts its parameters among those of the module, or takes them out.</summary>
    LoraAdapter? Adapter { get; set; }

    /// <summary>Adds the adapter to the weight, rounded to its type once; the adapter is gone.</summary>
    void MergeAdapter();

    /// <summary>The sum as a new tensor; the weight itself where there is no adapter.</summary>
    Tensor MergedWeight();
}

/// <summary>
/// A low-rank addition to a weight, ΔW = s B A with A [r, in] and B [out, r] (LoRA, Hu et al. 2021, arXiv 2106.09685), as forward/backward
/// pairs: y += s dropout(x) Aᵀ Bᵀ beside a linear layer, x += s A[:, ids]ᵀ Bᵀ beside an embedding. ΔW itself is formed only to be merged.
/// </summary>
/// <remarks>
/// A and B are float32 (float64 beside float64 weights), as PEFT keeps them: files are read and written exactly. Products run in the type
/// of the weights, as PEFT's do under autocast, so a bfloat16 layer makes no float32 copy of its rows.
/// </remarks>
public sealed class LoraAdapter : IDisposable
{
    private const long MergeBytes = 16 << 20;

    private readonly Matrix _a;
    private readonly Matrix _b;
    private readonly double _dropout;
    private readonly long _number;

    /// <summary>An adapter over given matrices.</summary>
    /// <param name="a">[r, in]; beside an embedding [r, V].</param>
    /// <param name="b">[out, r]; beside an embedding [d, r].</param>
    /// <param name="scale">s: lora_alpha / r, or lora_alpha / √r (rank-stabilized, arXiv 2312.03732).</param>
    /// <param name="dropout">Probability that an element of x is dropped on the way to A; beside an embedding there is none.</param>
    /// <param name="number">A number of its own among the adapters of a model, so that no two share a mask.</param>
    public LoraAdapter(Parameter a, Parameter b, double scale, double dropout = 0, long number = 0)
    {
        if (a.dim() != 2 || b.dim() != 2 || a.size(0) != b.size(1))
            throw new ArgumentException($"A is [{string.Join(", ", a.shape)}] and B [{string.Join(", ", b.shape)}]; they must be [r, in] and [out, r].", nameof(b));
        if (dropout is not (>= 0 and < 1)) throw new ArgumentOutOfRangeException(nameof(dropout), dropout, "dropout must be in [0, 1).");
        (A, B, Scale, _dropout, _number) = (a, b, scale, dropout, number);
        (_a, _b) = (new Matrix(a), new Matrix(b));
    }

    /// <summary>[r, in].</summary>
    public Parameter A { get; }

    /// <summary>[out, r].</summary>
    public Parameter B { get; }

    /// <summary>s.</summary>
    public double Scale { get; }

    /// <summary>Puts A and B among the parameters of a module, as <c>{prefix}A.weight</c> and <c>{prefix}B.weight</c>; null takes out what is there.</summary>
    internal static void Register(nn.Module owner, string prefix, LoraAdapter? adapter)
    {
        foreach (var (name, matrix) in new[] { ($"{prefix}A", adapter?._a), ($"{prefix}B", adapter?._b) })
        {
            owner.register_module(name, null!); // a name is taken only once
            if (matrix is not null) owner.register_module(name, matrix);
        }
    }

    /// <summary>y += s dropout(x) Aᵀ Bᵀ, in place; also recorded by autograd. Shapes: x [rows, in], y [rows, out].</summary>
    internal void AddTo(Tensor y, Tensor x, DropoutRows? rows)
    {
        using var scope = NewDisposeScope();
        var (dropped, scale) = Drop(x, rows);
        y.addmm_(dropped.mm(As(A, x).t()).mul(scale), As(B, x).t());
    }

    /// <summary>dx += s mask ⊙ (dy B A), in place. Shapes: dy [rows, out], dx [rows, in].</summary>
    internal void AddInputGradient(Tensor dx, Tensor dy, DropoutRows? rows)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var dz = dy.mm(As(B, dy)).mul_(ScaleOf(rows));
        if (!Drops(rows, out var pass))
        {
            dx.addmm_(dz, As(A, dy));
            return;
        }
        var through = dz.mm(As(A, dy));
        pass.Mask_(through, _dropout, _number);
        dx.add_(through);
    }

    /// <summary>B.grad += s dyᵀ z with z = dropout(x) Aᵀ, A.grad += s (dy B)ᵀ dropout(x). Shapes: x [rows, in], dy [rows, out].</summary>
    internal void AccumulateGradients(Tensor x, Tensor dy, DropoutRows? rows)
    {
        if (!A.requires_grad && !B.requires_grad) return;
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var (dropped, scale) = Drop(x, rows);
        Gradients.AccumulateProduct(B, dy, dropped.mm(As(A, x).t()).mul_(scale));
        Gradients.AccumulateProduct(A, dy.mm(As(B, dy)).mul_(scale), dropped);
    }

    /// <summary>x += s A[:, ids]ᵀ Bᵀ, in place; also recorded by autograd. Shapes: x [rows, d], ids [rows].</summary>
    internal void AddRowsTo(Tensor x, Tensor ids)
    {
        using var scope = NewDisposeScope();
        x.addmm_(As(A.index_select(1, ids), x).t().mul(Scale), As(B, x).t());
    }

    /// <summary>The gradients of <see cref="AddRowsTo"/>. Shapes: ids [rows], dx [rows, d].</summary>
    internal void AccumulateRowGradients(Tensor ids, Tensor dx)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        Gradients.AccumulateProduct(B, dx, As(A.index_select(1, ids), dx).t().mul(Scale));
        if (!A.requires_grad) return;
        A.grad ??= zeros_like(A);
        A.grad!.index_add_(1, ids, dx.mm(As(B, dx)).mul_(Scale).t().to(A.dtype), 1);
    }

    /// <summary>W += s left right, in the type of A and rounded once, a block of rows at a time. Shapes: W [m, n], left [m, r], right [r, n].</summary>
    internal void MergeInto(Tensor weight, Tensor left, Tensor right)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        long block = Math.Max(1, MergeBytes / (weight.size(1) * A.element_size()));
        Chunking.ForEach(weight.size(0), block, (start, count) =>
        {
            var rows = weight.narrow(0, start, count);
            rows.copy_(left.narrow(0, start, count).mm(right).mul_(Scale).add_(rows));
        });
    }

    /// <summary>W + s left right, a new tensor.</summary>
    internal Tensor Merged(Tensor weight, Tensor left, Tensor right)
    {
        using var noGrad = no_grad();
        var merged = weight.clone();
        MergeInto(merged, left, right);
        return merged;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _a.Dispose();
        _b.Dispose();
    }

    /// <exception cref="ArgumentException">B A is not [rows, columns].</exception>
    internal void CheckFits(long rows, long columns)
    {
        if (A.size(1) != columns || B.size(0) != rows)
            throw new ArgumentException($"An adapter of A [{string.Join(", ", A.shape)}] and B [{string.Join(", ", B.shape)}] does not fit: they must be [r, {columns}] and [{rows}, r].");
    }

    private bool Drops(DropoutRows? rows, out DropoutRows pass)
    {
        pass = rows ?? default;
        return rows is not null && _dropout > 0;
    }

    // The kept elements' 1 / (1 − p) is a factor of the product.
    private double ScaleOf(DropoutRows? rows) => Drops(rows, out _) ? Scale / (1 - _dropout) : Scale;

    private (Tensor Dropped, double Scale) Drop(Tensor x, DropoutRows? rows)
    {
        if (!Drops(rows, out var pass)) return (x, Scale);
        var dropped = x.clone();
        pass.Mask_(dropped, _dropout, _number);
        return (dropped, ScaleOf(rows));
    }

    private static Tensor As(Tensor matrix, Tensor other) => matrix.to(other.dtype);

    private sealed class Matrix : nn.Module
    {
        public Matrix(Parameter weight) : base(nameof(Matrix)) => register_parameter("weight", weight);
    }
}
