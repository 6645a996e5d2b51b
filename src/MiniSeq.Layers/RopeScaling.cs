using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>How a rotary embedding is stretched to texts longer than those of pre-training, Hugging Face <c>rope_scaling</c>.</summary>
public abstract record RopeScaling
{
    /// <summary>Factor of cos and sin.</summary>
    internal virtual double Magnitude => 1;

    /// <summary>The inverse frequencies θ^(−2i/D), [D/2] float32, stretched: a new tensor.</summary>
    internal abstract Tensor Scale(Tensor inverseFrequencies, double theta);

    // 0 below the first, 1 above the second, a straight line between.
    private protected static Tensor Ramp(Tensor x, double from, double to) => ((x - from) / (to - from)).clamp(0, 1);
}

/// <summary>Position interpolation (Chen et al. 2023, arXiv 2306.15595), <c>rope_type: linear</c>: every angle divided by the factor.</summary>
public sealed record LinearRopeScaling(double Factor) : RopeScaling
{
    internal override Tensor Scale(Tensor inverseFrequencies, double theta) => inverseFrequencies / Factor;
}

/// <summary>
/// Llama 3.1's, <c>rope_type: llama3</c> (arXiv 2407.21783): wavelengths above original / lowFreqFactor are stretched by the factor,
/// those below original / highFreqFactor are not, and those between in part.
/// </summary>
/// <param name="Factor">Of the long wavelengths.</param>
/// <param name="LowFreqFactor">Where full stretching begins.</param>
/// <param name="HighFreqFactor">Where it ends.</param>
/// <param name="OriginalMaxPositionEmbeddings">Tokens of the longest text of pre-training.</param>
public sealed record Llama3RopeScaling(double Factor, double LowFreqFactor, double HighFreqFactor, int OriginalMaxPositionEmbeddings) : RopeScaling
{
    internal override Tensor Scale(Tensor inverseFrequencies, double theta)
    {
        using var scope = NewDisposeScope();
        var turns = inverseFrequencies * (OriginalMaxPositionEmbeddings / (2 * Math.PI)); // original / wavelength
        var kept = Ramp(turns, LowFreqFactor, HighFreqFactor);
        return (((1 - kept) * inverseFrequencies / Factor) + (kept * inverseFrequencies)).MoveToOuterDisposeScope();
    }
}

/// <summary>
/// YaRN (Peng et al. 2023, arXiv 2309.00071), <c>rope_type: yarn</c>: as Llama 3's, by turns over the original length, and a temperature of
/// attention. As in the paper and transformers 5; some 4.x versions took max_position_embeddings / original for the factor, whatever the file said.
/// </summary>
/// <param name="Factor">Of the long wavelengths.</param>
/// <param name="OriginalMaxPositionEmbeddings">Tokens of the longest text of pre-training.</param>
/// <param name="BetaFast">Dimensions that turn more often than this are not stretched.</param>
/// <param name="BetaSlow">Those that turn less often are stretched in full.</param>
/// <param name="AttentionFactor">Of cos and sin; null is 0.1 ln(factor) + 1.</param>
public sealed record YarnRopeScaling(double Factor, int OriginalMaxPositionEmbeddings, double BetaFast = 32, double BetaSlow = 1, double? AttentionFactor = null) : RopeScaling
{
    internal override double Magnitude => AttentionFactor ?? (Factor <= 1 ? 1 : (0.1 * Math.Log(Factor)) + 1);

    internal override Tensor Scale(Tensor inverseFrequencies, double theta)
    {
        using var scope = NewDisposeScope();
        long half = inverseFrequencies.size(0), dim = 2 * half;
        // The dimension, a pair each, that makes this many turns.
        double Pair(double turns) => dim * Math.Log(OriginalMaxPositionEmbeddings / (turns * 2 * Math.PI)) / (2 * Math.Log(theta));
        double low = Math.Max(Math.Floor(Pair(BetaFast)), 0), high = Math.Min(Math.Ceiling(Pair(BetaSlow)), dim - 1);
        if (low == high) high += 0.001;
        var stretched = Ramp(arange(0, half, ScalarType.Float32, inverseFrequencies.device), low, high);
        return ((stretched * inverseFrequencies / Factor) + ((1 - stretched) * inverseFrequencies)).MoveToOuterDisposeScope();
    }
}
