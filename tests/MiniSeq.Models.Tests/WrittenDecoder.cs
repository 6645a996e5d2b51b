using MiniSeq.Layers;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

/// <summary>
/// The decoder written a second time from its formulas, number by number in double and without any layer of the library: for settings of
/// which there is no reference by Hugging Face. Tests hold it against Hugging Face's numbers where there are some.
/// </summary>
internal sealed class WrittenDecoder(CausalLM model)
{
    private readonly DecoderConfig _config = model.Config;
    private readonly Dictionary<string, double[,]> _weights = model.named_parameters().ToDictionary(p => p.name, p => Matrix(p.parameter));

    /// <summary>Logits [S, V].</summary>
    public double[,] Logits(long[] ids)
    {
        var embedding = _weights["model.embed_tokens.weight"];
        double scale = _config.ScaleEmbeddings ? Math.Sqrt(_config.HiddenSize) : 1;
        double[][] x = [.. ids.Select(id => Enumerable.Range(0, _config.HiddenSize).Select(i => embedding[id, i] * scale).ToArray())];
        for (int l = 0; l < _config.NumHiddenLayers; l++) x = Layer(x, l);
        var z = x.Select(row => Linear(_config.TieWordEmbeddings ? "model.embed_tokens" : "lm_head", Norm("model.norm", row))).ToArray();
        var result = new double[ids.Length, _config.VocabSize];
        for (int t = 0; t < ids.Length; t++)
            for (int v = 0; v < _config.VocabSize; v++)
                result[t, v] = Cap(z[t][v], _config.FinalLogitSoftcapping);
        return result;
    }

    private double[][] Layer(double[][] x, int l)
    {
        string name = $"model.layers.{l}.";
        double[][] h = [.. x.Select(row => Norm(name + "input_layernorm", row))];
        var attention = Attention(h, name + "self_attn.", _config.WindowOf(l));
        double[][] r = [.. x.Zip(attention, (a, b) => Sum(a, _config.PostNorms ? Norm(name + "post_attention_layernorm", b) : b))];
        string before = _config.PostNorms ? "pre_feedforward_layernorm" : "post_attention_layernorm";
        return [.. r.Select(row =>
        {
            var m = Mlp(name + "mlp.", Norm(name + before, row));
            return Sum(row, _config.PostNorms ? Norm(name + "post_feedforward_layernorm", m) : m);
        })];
    }

    private double[][] Attention(double[][] h, string name, int? window)
    {
        int d = _config.HeadDim, group = _config.NumAttentionHeads / _config.NumKeyValueHeads;
        double[][][] Heads(string projection, string? norm) => [.. h.Select((row, t) => Linear(name + projection, row).Chunk(d)
            .Select(head => norm is null ? head : Turn(_config.QkNorm ? Norm(name + norm, head) : head, t)).ToArray())];
        var (q, k, v) = (Heads("q_proj", "q_norm"), Heads("k_proj", "k_norm"), Heads("v_proj", null));
        return [.. h.Select((_, t) =>
        {
            var output = new double[_config.NumAttentionHeads * d];
            for (int n = 0; n < _config.NumAttentionHeads; n++)
            {
                int from = window is { } w ? Math.Max(0, t - w + 1) : 0;
                double[] p = [.. Enumerable.Range(from, t - from + 1).Select(s => Math.Exp(Cap(Dot(q[t][n], k[s][n / group]) / Math.Sqrt(_config.QueryPreAttnScalar ?? d), _config.AttnLogitSoftcapping)))];
                for (int i = 0; i < d; i++) output[(n * d) + i] = p.Select((weight, s) => weight * v[from + s][n / group][i]).Sum() / p.Sum();
            }
            return Linear(name + "o_proj", output);
        })];
    }

    private double[] Mlp(string name, double[] x)
    {
        var (gate, up) = (Linear(name + "gate_proj", x), Linear(name + "up_proj", x));
        double Act(double g) => _config.HiddenAct == Activation.Silu ? g / (1 + Math.Exp(-g)) : 0.5 * g * (1 + Math.Tanh(Math.Sqrt(2 / Math.PI) * (g + (0.044715 * g * g * g))));
        return Linear(name + "down_proj", [.. gate.Zip(up, (g, u) => Act(g) * u)]);
    }

    private double[] Turn(double[] x, int position)
    {
        int half = x.Length / 2;
        var y = new double[x.Length];
        for (int i = 0; i < half; i++)
        {
            var (frequency, factor) = Frequency(i, x.Length);
            double cos = Math.Cos(position * frequency) * factor, sin = Math.Sin(position * frequency) * factor;
            (y[i], y[half + i]) = ((x[i] * cos) - (x[half + i] * sin), (x[half + i] * cos) + (x[i] * sin));
        }
        return y;
    }

    // As in transformers' modeling_rope_utils.
    private (double Frequency, double Factor) Frequency(int i, int dim)
    {
        double f = Math.Pow(_config.RopeTheta, -2.0 * i / dim);
        switch (_config.RopeScaling)
        {
            case LinearRopeScaling s:
                return (f / s.Factor, 1);
            case Llama3RopeScaling s:
                double wavelength = 2 * Math.PI / f;
                if (wavelength < s.OriginalMaxPositionEmbeddings / s.HighFreqFactor) return (f, 1);
                if (wavelength > s.OriginalMaxPositionEmbeddings / s.LowFreqFactor) return (f / s.Factor, 1);
                double smooth = ((s.OriginalMaxPositionEmbeddings / wavelength) - s.LowFreqFactor) / (s.HighFreqFactor - s.LowFreqFactor);
                return (((1 - smooth) * f / s.Factor) + (smooth * f), 1);
            case YarnRopeScaling s:
                double Dimension(double rotations) => dim * Math.Log(s.OriginalMaxPositionEmbeddings / (rotations * 2 * Math.PI)) / (2 * Math.Log(_config.RopeTheta));
                double low = Math.Max(Math.Floor(Dimension(s.BetaFast)), 0), high = Math.Min(Math.Ceiling(Dimension(s.BetaSlow)), dim - 1);
                double ramp = Math.Clamp((i - low) / (high == low ? 0.001 : high - low), 0, 1);
                return ((f / s.Factor * ramp) + (f * (1 - ramp)), s.AttentionFactor ?? ((0.1 * Math.Log(s.Factor)) + 1));
            default:
                return (f, 1);
        }
    }

    private double[] Norm(string name, double[] x)
    {
        var w = _weights[name + ".weight"];
        double r = 1 / Math.Sqrt(x.Select(v => v * v).Average() + _config.RmsNormEps);
        return [.. x.Select((v, i) => v * r * (w[0, i] + (_config.RmsNormUnitOffset ? 1 : 0)))];
    }

    private double[] Linear(string name, double[] x)
    {
        var w = _weights[name + ".weight"];
        var bias = _weights.GetValueOrDefault(name + ".bias");
        var y = new double[w.GetLength(0)];
        for (int o = 0; o < y.Length; o++)
        {
            for (int i = 0; i < x.Length; i++) y[o] += w[o, i] * x[i];
            if (bias is not null) y[o] += bias[0, o];
        }
        return y;
    }

    private static double Cap(double x, double? cap) => cap is { } c ? c * Math.Tanh(x / c) : x;

    private static double Dot(double[] a, double[] b) => a.Zip(b, (x, y) => x * y).Sum();

    private static double[] Sum(double[] a, double[] b) => [.. a.Zip(b, (x, y) => x + y)];

    private static double[,] Matrix(Tensor t)
    {
        using var scope = NewDisposeScope();
        var wide = t.detach().to(ScalarType.Float64);
        wide = wide.dim() == 1 ? wide.unsqueeze(0) : wide;
        var result = new double[wide.size(0), wide.size(1)];
        Buffer.BlockCopy(wide.contiguous().data<double>().ToArray(), 0, result, 0, result.Length * sizeof(double));
        return result;
    }
}
