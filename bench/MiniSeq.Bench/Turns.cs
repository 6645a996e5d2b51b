using System.Diagnostics;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>Forms of the same work, taking turns in this process.</summary>
internal static class Turns
{
    /// <summary>What a form came to.</summary>
    /// <param name="Seconds">Median of each of its phases.</param>
    /// <param name="PeakBytes">Most tensor memory over what was there before, the largest of all turns.</param>
    public readonly record struct Measured(double[] Seconds, long PeakBytes);

    /// <summary>The settings under which all commands measure.</summary>
    public static void Prepare(int threads)
    {
        TensorMemory.KeepFreedMemory(); // first: MiniSeq.Layers sets how threads wait as it loads, before libtorch does
        if (threads > 0) set_num_threads(threads);
        if (!TensorMemory.StartCounting()) Console.Error.WriteLine("No exact count of tensor memory on this system: peaks are 0.");
    }

    /// <summary>Each form in turn, round after round; a first round does not count.</summary>
    /// <param name="rounds">Rounds that count; with 0 the first is for its peak only.</param>
    /// <param name="forms">Runs once and returns the seconds of its phases; in a dispose scope.</param>
    public static Measured[] Run(int rounds, params Func<double[]>[] forms)
    {
        var (seconds, peaks) = (Array.ConvertAll(forms, _ => new List<double[]>()), new long[forms.Length]);
        for (int round = 0; round <= rounds; round++)
            for (int i = 0; i < forms.Length; i++)
            {
                var (phases, peak) = One(forms[i]);
                if (round > 0 || rounds == 0) peaks[i] = Math.Max(peaks[i], peak);
                if (round > 0) seconds[i].Add(phases);
            }
        return [.. seconds.Zip(peaks, (s, peak) => new Measured(Medians(s), peak))];
    }

    public static double Seconds(Action run)
    {
        var clock = Stopwatch.StartNew();
        run();
        return clock.Elapsed.TotalSeconds;
    }

    private static double[] Medians(List<double[]> turns) => turns.Count == 0 ? [] : [.. turns[0].Select((_, phase) => Report.Median(turns.Select(t => t[phase])))];

    private static (double[] Phases, long Peak) One(Func<double[]> form)
    {
        using var scope = NewDisposeScope();
        long before = TensorMemory.LiveBytes;
        TensorMemory.ResetPeak();
        return (form(), TensorMemory.PeakBytes - before);
    }
}
