/** The style of the report page. Series colours keep their distance for colour-blind eyes and in both themes. */
export const pageStyle = `
:root {
  --ground: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #5b6776; --faint: #e4e8ed; --rule: #c3cad3;
  --good: #0b7a4b; --notice: #8a5a00; --warning: #b3261e;
  --s0: #2563c9; --s1: #d9590b; --s2: #0d8f6c; --s3: #8a3fc0; --s4: #b88700; --s5: #c2307f; --s6: #1188a8; --s7: #6b7683;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #10151b; --card: #1a212a; --ink: #e8edf3; --soft: #9aa7b5; --faint: #2a333e; --rule: #4a5664;
    --good: #4fd39a; --notice: #f0b849; --warning: #ff8a80;
    --s0: #6ea8ff; --s1: #ff9d5c; --s2: #45d0a5; --s3: #c592f2; --s4: #e6c14a; --s5: #f583bd; --s6: #5cc9e6; --s7: #a3afbc;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
.brand { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
h1 { margin: 2px 0 14px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 20px; }
h3, h4 { margin: 0; font-size: 14px; }
.lead { margin: 0 0 14px; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 0 24px; }
dt { color: var(--soft); font-size: 12px; }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; }
.tile, .chart, .sample, details, .hints { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; }
.tile { padding: 14px 16px 10px; }
.tile h3 { color: var(--soft); font-weight: 500; font-size: 13px; overflow-wrap: anywhere; }
.tile .value { margin: 2px 0 0; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile .from { margin: 0 0 6px; color: var(--soft); font-size: 13px; }
.miniature { width: 100%; height: 32px; }
.hints { margin: 0; padding: 4px 16px; list-style: none; }
.hints li { display: flex; gap: 12px; padding: 8px 0; border-bottom: 1px solid var(--faint); }
.hints li:last-child { border-bottom: 0; }
.hints strong { flex: 0 0 66px; }
.hints .good strong { color: var(--good); } .hints .notice strong { color: var(--notice); } .hints .warning strong { color: var(--warning); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 372px), 1fr)); gap: 16px; }
.chart { position: relative; margin: 0; padding: 16px 16px 8px; display: flex; flex-direction: column; }
.chart .unit { margin-left: 8px; color: var(--soft); font-weight: 400; font-size: 13px; }
.chart .note { margin: 1px 0 6px; color: var(--soft); font-size: 13px; }
.chart svg { display: block; width: 100%; height: auto; margin-top: auto; overflow: visible; touch-action: pan-y; }
.chart svg:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; border-radius: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 6px; padding: 0; list-style: none; font-size: 13px; }
.key { display: inline-block; width: 12px; height: 4px; margin-right: 6px; border-radius: 2px; vertical-align: middle; background: var(--c); }
.axes text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--faint); } .grid.zero { stroke: var(--rule); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.raw { stroke-width: 1; opacity: .35; } .line.thin { stroke-width: 1.2; stroke-dasharray: 4 4; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.area { fill: var(--c); stroke: var(--card); stroke-width: .75; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .s7, .s8, .s9, .s10, .s11, .s12 { --c: var(--s7); }
.cursor line { stroke: var(--rule); }
.tip { position: absolute; z-index: 1; padding: 7px 10px; pointer-events: none; white-space: nowrap; font-size: 13px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 7px; box-shadow: 0 3px 12px rgb(0 0 0 / .18); }
.tip b { display: block; } .tip span { float: right; margin-left: 18px; font-variant-numeric: tabular-nums; }
.sample { display: grid; gap: 14px 24px; margin-bottom: 14px; padding: 14px 16px; grid-template-columns: 1fr 1fr; }
.sample .prompt { grid-column: 1 / -1; }
.sample h4 { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; color: var(--soft); font-weight: 500; font-size: 13px; }
.sample:not(.compared) .answer { grid-column: 1 / -1; }
@media (max-width: 720px) { .sample { grid-template-columns: 1fr; } }
pre { margin: 4px 0 0; font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.empty { color: var(--soft); font-style: italic; }
.badge { padding: 0 8px; border: 1px solid var(--rule); border-radius: 20px; font-size: 12px; font-variant-numeric: tabular-nums; }
.badge.up { color: var(--good); border-color: currentColor; } .badge.down { color: var(--warning); border-color: currentColor; }
.badge.cut { color: var(--notice); border-color: currentColor; }
details { padding: 10px 16px; } summary { cursor: pointer; }
main { padding-bottom: 60px; }
table { width: 100%; margin-top: 10px; border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 4px 12px 4px 0; border-top: 1px solid var(--faint); text-align: left; vertical-align: top; font-weight: 400; }
th { width: 34%; color: var(--soft); } td { overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media print { .chart, .tile, .sample { break-inside: avoid; } }
`;
