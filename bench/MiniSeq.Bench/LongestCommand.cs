using System.CommandLine;
using System.Text.Json.Nodes;

namespace MiniSeq.Bench;

/// <summary>The command <c>longest</c>.</summary>
internal sealed class LongestCommand
{
    private readonly ModelOptions _model = new(ModelOptions.DefaultShape, "float32");
    private readonly Option<bool> _timed = new("--timed") { Description = "time a forward and backward at the longest sequence, too" };
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new LongestCommand();
        var command = new Command("longest", """
            The longest sequence of each variant within a budget of memory that grows with the sequence, and what a further token costs there:
            (peak at the longest - peak at half of it, of mini-sequence a quarter) / tokens between, beside the bytes of the kept layer inputs, layers x hidden x element.
            """) { it._timed, it._json };
        it._model.AddTo(command, it._model.VariantNames, it._model.Lora);
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        var result = new Comparison
        {
            Shape = _model.Shape(p),
            DTypes = _model.DTypes(p),
            Variants = _model.Variants(p),
            Threads = p.GetValue(_model.Threads),
            Compute = _model.LeastCompute(p, 0),
        }.RunLongest(_model.BudgetBytes(p), p.GetValue(_timed));
        Report.Table([" variant", " dtype", "longest, tokens", "tensors MB", "bytes a further token", "of them layer inputs", "ratio", "tokens/s at the longest"],
            ((JsonArray)result["variants"]!).Select(v => new[]
            {
                $"{v!["name"]}", $"{v["dtype"]}", Report.Cell(v["longest"]), Report.Cell(v["peakTensorBytes"], 0, 1 << 20),
                Report.Cell(v["bytesPerToken"]), Report.Cell(v["inputBytesPerToken"]), Report.Cell(v["slopeRatio"], 2), Report.Cell(v["tokensPerSecond"], 1),
            }));
        Comparison.PrintRest(result);
        Report.Write(p.GetValue(_json), result);
    }
}
