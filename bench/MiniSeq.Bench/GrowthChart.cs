using System.Globalization;
using ScottPlot;
using Point = MiniSeq.Bench.GrowthCommand.Point;

namespace MiniSeq.Bench;

/// <summary>Draws what <c>growth</c> measured: memory and speed over the length of the document, side by side.</summary>
internal static class GrowthChart
{
    private const int Width = 900, Height = 420, MostTicks = 8;
    private const float TextSize = 15;
    private const string FontName = "MiniSeq.Bench";

    private static readonly Dictionary<string, Color> s_colors = new()
    {
        ["mini-sequence"] = Color.FromHex("#0b6e4f"),
        ["recompute"] = Color.FromHex("#d17a00"),
        ["plain"] = Color.FromHex("#9b2226"),
    };

    public static void Save(IReadOnlyList<Point> points, string path)
    {
        UseAFont();
        var panels = new Multiplot();
        panels.AddPlots(2);
        panels.Layout = new ScottPlot.MultiplotLayouts.Columns();
        var (memory, speed) = (panels.GetPlot(0), panels.GetPlot(1));
        Panel(memory, points, p => Logarithm(p.PeakTensorBytes), "Peak memory of a training step, beyond weights");
        memory.Axes.Left.TickGenerator = Powers(points.Min(p => Logarithm(p.PeakTensorBytes)), points.Max(p => Logarithm(p.PeakTensorBytes)));
        memory.ShowLegend(Alignment.UpperLeft);
        memory.Legend.ShadowColor = Colors.Transparent;
        Panel(speed, points, p => p.TokensPerSecond, "Tokens per second");
        speed.Axes.Left.TickGenerator = new ScottPlot.TickGenerators.NumericAutomatic { LabelFormatter = v => v.ToString("N0", CultureInfo.InvariantCulture), MinorTickGenerator = new ScottPlot.TickGenerators.EvenlySpacedMinorTickGenerator(1) };
        speed.Axes.SetLimitsY(0, 1.08 * points.Max(p => p.TokensPerSecond));
        speed.HideLegend();
        panels.SavePng(path, Width, Height);
    }

    private static void Panel(Plot plot, IReadOnlyList<Point> points, Func<Point, double> value, string title)
    {
        bool types = points.Select(p => p.DType).Distinct().Count() > 1;
        foreach (var line in points.GroupBy(GrowthCommand.Form))
        {
            var first = line.First();
            var scatter = plot.Add.Scatter(line.Select(p => Math.Log2(p.Seq)).ToArray(), line.Select(value).ToArray(), s_colors[first.Name]);
            (scatter.LineWidth, scatter.MarkerSize, scatter.LegendText) = (2.5f, 8, types ? line.Key : first.Name);
            if (types && first.DType == "float32") scatter.LinePattern = LinePattern.Dashed;
        }
        plot.Title(title, TextSize);
        plot.XLabel("tokens of the document", TextSize);
        plot.Axes.Title.Label.Bold = plot.Axes.Bottom.Label.Bold = false; // the font is one file
        (plot.Legend.FontSize, plot.Grid.MajorLineColor) = (TextSize, Colors.Black.WithAlpha(0.1));
        plot.Axes.Bottom.TickLabelStyle.FontSize = plot.Axes.Left.TickLabelStyle.FontSize = TextSize;
        plot.Axes.Bottom.TickGenerator = new ScottPlot.TickGenerators.NumericManual([.. points.Select(p => p.Seq).Distinct().Select(s => new Tick(Math.Log2(s), Tokens(s)))]);
    }

    // On Linux this build of Skia knows no fonts of the system (it does without fontconfig): the first of the usual ones that is a file.
    private static void UseAFont()
    {
        const string Folder = "/usr/share/fonts";
        if (!OperatingSystem.IsLinux()) return;
        string[] wanted = ["DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf"];
        var files = wanted.SelectMany(f => Directory.Exists(Folder) ? Directory.EnumerateFiles(Folder, f, SearchOption.AllDirectories) : []);
        string file = files.FirstOrDefault() ?? throw new InvalidOperationException($"A picture needs a font: none of {string.Join(", ", wanted)} is below {Folder} (Debian: fonts-dejavu-core).");
        Fonts.AddFontFile(FontName, file);
        Fonts.Default = FontName;
    }

    private static string Tokens(int seq) => seq % 1024 == 0 ? $"{seq / 1024}k" : $"{seq}";

    // Powers of two of a megabyte, as many as there is room for.
    private static ScottPlot.TickGenerators.NumericManual Powers(double lowest, double highest)
    {
        int step = Math.Max(1, (int)Math.Ceiling((highest - lowest) / MostTicks));
        return new([.. Enumerable.Range(0, MostTicks + 2).Select(i => Math.Floor(lowest) + (i * step)).Select(log => new Tick(log, Megabytes(log)))]);
    }

    private static double Logarithm(long bytes) => Math.Log2(bytes / (double)(1 << 20));

    private static string Megabytes(double log) => log >= 10 ? $"{Math.Pow(2, log - 10):0} GB" : $"{Math.Pow(2, log):0.##} MB";
}
