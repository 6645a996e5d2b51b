using System.Diagnostics;
using System.Text.Json;
using MiniSeq.Layers;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>What the parent asks of a process of its own.</summary>
/// <param name="Kind">step, longest or gemm.</param>
/// <param name="Shape">Model and batch.</param>
/// <param name="Variant">Which of the three.</param>
/// <param name="DType">float32 or bfloat16.</param>
/// <param name="Steps">Steps to time.</param>
/// <param name="Optimizer">Whether AdamW is part of a step.</param>
/// <param name="BudgetBytes">For longest.</param>
/// <param name="Compute">Options of mini-sequence.</param>
/// <param name="Threads">Threads of libtorch; 0 leaves its own choice.</param>
/// <param name="Timed">For longest: whether a step at it is timed.</param>
/// <param name="WarmUp">For step: whether a first step is not timed.</param>
internal sealed record Order(string Kind, Shape Shape, Variant Variant, string DType, int Steps, bool Optimizer, long BudgetBytes, ComputeOptions Compute, int Threads, bool Timed = false, bool WarmUp = true);

/// <summary>What a process reports.</summary>
internal sealed record Outcome
{
    public double[] Seconds { get; init; } = [];
    public double Loss { get; init; }
    public long PeakResidentBytes { get; init; }
    public long PeakTensorBytes { get; init; }
    public long BaseBytes { get; init; }
    public int Longest { get; init; }

    /// <summary>Of a peak at the longest over that at half of it.</summary>
    public double BytesPerToken { get; init; }

    public double Gflops { get; init; }
    public string Product { get; init; } = "";
    public int Threads { get; init; }
}

/// <summary>One variant in one process, so that its memory is its own.</summary>
internal static class Worker
{
    private const string Mark = "outcome: ";
    private static readonly JsonSerializerOptions s_json = new() { NumberHandling = System.Text.Json.Serialization.JsonNumberHandling.AllowNamedFloatingPointLiterals };

    /// <summary>Starts this program again with an order and waits for the outcome.</summary>
    public static Outcome Start(Order order)
    {
        var start = new ProcessStartInfo(Environment.ProcessPath!) { RedirectStandardOutput = true };
        if (Path.GetFileNameWithoutExtension(Environment.ProcessPath) == "dotnet") start.ArgumentList.Add(typeof(Worker).Assembly.Location);
        start.ArgumentList.Add("worker");
        start.ArgumentList.Add(JsonSerializer.Serialize(order, s_json));
        using var process = Process.Start(start)!;
        string? outcome = null;
        while (process.StandardOutput.ReadLine() is { } line)
        {
            if (line.StartsWith(Mark, StringComparison.Ordinal)) outcome = line[Mark.Length..];
            else Console.Error.WriteLine(line);
        }
        process.WaitForExit();
        if (outcome is null || process.ExitCode != 0)
            throw new InvalidOperationException($"The process of {Shape.Name(order.Variant)} ({order.DType}) ended with code {process.ExitCode}{(process.ExitCode == 137 ? ": out of memory" : "")}.");
        return JsonSerializer.Deserialize<Outcome>(outcome, s_json)!;
    }

    /// <summary>Carries out an order in this process.</summary>
    public static int Run(string json)
    {
        var order = JsonSerializer.Deserialize<Order>(json, s_json)!;
        Turns.Prepare(order.Threads);
        var outcome = order.Kind switch
        {
            "step" => Step(order),
            "longest" when order.Variant == Variant.MiniSequence => LongestPlanned(order),
            "longest" => Longest(order),
            "gemm" => Gemm(order),
            _ => throw new ArgumentException($"Unknown order '{order.Kind}'."),
        };
        Console.WriteLine(Mark + JsonSerializer.Serialize(outcome with { Threads = get_num_threads() }, s_json));
        return 0;
    }

    private static Outcome Step(Order order)
    {
        using var runner = new StepRunner(order.Shape, order.Variant, Shape.ParseDType(order.DType), order.Optimizer, order.Compute);
        var documents = order.Shape.Documents(order.Shape.Seq);
        if (order.WarmUp) runner.Step(documents); // code, threads and heap
        TensorMemory.ResetPeak();
        var seconds = new double[order.Steps];
        double loss = 0;
        for (int i = 0; i < seconds.Length; i++) seconds[i] = Turns.Seconds(() => loss = runner.Step(documents));
        return new Outcome
        {
            Seconds = seconds,
            Loss = loss,
            PeakResidentBytes = TensorMemory.PeakResidentBytes - runner.BaseResidentBytes,
            PeakTensorBytes = TensorMemory.PeakBytes - runner.BaseTensorBytes,
            BaseBytes = runner.BaseTensorBytes,
        };
    }

    // A long run takes minutes, and its peak is of another stage than a short one's: the memory plan gives the length, a hundredth below, and a run there shows that it fits.
    private static Outcome LongestPlanned(Order order)
    {
        using var runner = new StepRunner(order.Shape, order.Variant, Shape.ParseDType(order.DType), optimizer: false, order.Compute);
        int longest = (int)(0.99 * Math.Max(16, runner.PlannedLongest(order.BudgetBytes))), seq = longest / 4;
        long shorter = Peak(seq), peak;
        double slope, seconds;
        while (true)
        {
            peak = 0;
            seconds = Turns.Seconds(() => peak = Peak(longest));
            slope = Math.Max(1, (double)(peak - shorter) / (longest - seq));
            if (peak <= order.BudgetBytes) break;
            longest -= 1 + (longest / 100) + (int)((peak - order.BudgetBytes) / slope);
            if (longest <= seq) return new Outcome { BaseBytes = runner.BaseTensorBytes };
        }
        return new Outcome
        {
            Longest = longest,
            PeakTensorBytes = peak,
            BaseBytes = runner.BaseTensorBytes,
            BytesPerToken = slope / order.Shape.Batch,
            Seconds = order.Timed ? [seconds] : [],
        };

        long Peak(int length)
        {
            long bytes = runner.GrowingTensorBytes(length);
            Console.WriteLine($"  {Shape.Name(order.Variant)} {order.DType}: {length} tokens, {bytes / 1e6:F0} MB");
            return bytes;
        }
    }

    // The peak is close to a line in the length: two short runs give a guess, a few more close in on the edge of the budget.
    private static Outcome Longest(Order order)
    {
        const int First = 64;
        using var runner = new StepRunner(order.Shape, order.Variant, Shape.ParseDType(order.DType), optimizer: false, order.Compute);
        var (fits, over) = ((Seq: 0, Peak: 0L), (Seq: int.MaxValue, Peak: 0L));
        var previous = (Seq: First, Peak: runner.GrowingTensorBytes(First));
        int next = 4 * First;
        while (over.Seq - fits.Seq > Math.Max(1, fits.Seq / 50))
        {
            long peak = runner.GrowingTensorBytes(next);
            Console.WriteLine($"  {Shape.Name(order.Variant)} {order.DType}: {next} tokens, {peak / 1e6:F0} MB");
            if (peak <= order.BudgetBytes) fits = (next, peak);
            else over = (next, peak);
            if (over.Seq <= 2) break; // not even two tokens fit
            double slope = next == previous.Seq ? 1 : Math.Max(1, (double)(peak - previous.Peak) / (next - previous.Seq));
            if (Math.Abs(next - previous.Seq) > next / 10) previous = (next, peak);
            int guess = (int)Math.Clamp(next + ((order.BudgetBytes - peak) / slope), Math.Max(2, next / 8.0), 8.0 * next);
            // Just beside a bound that is already known, so that the next run settles it.
            if (guess <= fits.Seq) guess = fits.Seq + Math.Max(1, fits.Seq / 50);
            if (guess >= over.Seq) guess = Math.Max(fits.Seq + 1, over.Seq - Math.Max(1, fits.Seq / 50));
            next = guess;
        }
        return new Outcome
        {
            Longest = fits.Seq,
            PeakTensorBytes = fits.Peak,
            BaseBytes = runner.BaseTensorBytes,
            BytesPerToken = fits.Seq < 4 ? 0 : (double)(fits.Peak - runner.GrowingTensorBytes(fits.Seq / 2)) / (fits.Seq - (fits.Seq / 2)) / order.Shape.Batch,
            Seconds = order.Timed && fits.Seq > 0 ? [Turns.Seconds(() => runner.Step(order.Shape.Documents(fits.Seq)))] : [],
        };
    }

    private static Outcome Gemm(Order order)
    {
        var (gflops, name) = ProductRates.Fastest(order.Shape, Shape.ParseDType(order.DType));
        return new Outcome { Gflops = gflops, Product = name };
    }
}
